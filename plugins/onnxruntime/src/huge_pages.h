// Memory in huge pages: a kernel that reads weights once misses the address cache at every small page.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace rq {

// For memory that has not been read yet, so that what a mapped file holds comes into huge pages (Linux 6.16 and newer on ext4,
// older ones on XFS). Without effect elsewhere.
inline void prefer_huge_pages(const void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// Whether what lies at `address`, which has been read, is in a huge page. Linux 6.7 and newer can tell; false elsewhere.
inline bool in_huge_page(const void* address) {
  bool found = false;
#ifdef __linux__
  struct Region {
    uint64_t start, end, categories;
  };
  struct Scan {  // pm_scan_arg of linux/fs.h, which older headers lack
    uint64_t size, flags, start, end, walk_end, regions, region_count, max_pages;
    uint64_t category_inverted, category_mask, category_any, return_mask;
  };
  constexpr uint64_t kSmallPage = 4096, kIsHuge = uint64_t{1} << 6;
  const uint64_t page = reinterpret_cast<uintptr_t>(address) / kSmallPage * kSmallPage;
  Region region{};
  Scan scan{};
  scan.size = sizeof scan;
  scan.start = page;
  scan.end = page + kSmallPage;
  scan.regions = reinterpret_cast<uintptr_t>(&region);
  scan.region_count = 1;
  scan.category_mask = scan.return_mask = kIsHuge;
  const int file = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  found = ioctl(file, _IOWR('f', 16, Scan), &scan) == 1 && (region.categories & kIsHuge) != 0;
  close(file);
#else
  (void)address;
#endif
  return found;
}

}  // namespace rq
