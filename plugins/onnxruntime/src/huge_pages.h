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

// Bytes of `data` that have been read, and those of them that are in huge pages. Linux 6.7 and newer can tell; zeros elsewhere.
struct MappedBytes {
  uint64_t all = 0, huge = 0;
};
inline MappedBytes mapped_bytes(const void* data, size_t bytes) {
  MappedBytes found;
#ifdef __linux__
  struct Region {
    uint64_t start, end, categories;
  } regions[64];
  struct Scan {  // pm_scan_arg of linux/fs.h, which older headers lack
    uint64_t size, flags, start, end, walk_end, regions, region_count, max_pages;
    uint64_t category_inverted, category_mask, category_any, return_mask;
  };
  constexpr uint64_t kSmallPage = 4096, kIsPresent = uint64_t{1} << 3, kIsHuge = uint64_t{1} << 6;
  Scan scan{};
  scan.size = sizeof scan;
  scan.start = reinterpret_cast<uintptr_t>(data) / kSmallPage * kSmallPage;
  scan.end = (reinterpret_cast<uintptr_t>(data) + bytes + kSmallPage - 1) / kSmallPage * kSmallPage;
  scan.regions = reinterpret_cast<uintptr_t>(regions);
  scan.region_count = sizeof regions / sizeof regions[0];
  scan.category_mask = kIsPresent;
  scan.return_mask = kIsPresent | kIsHuge;
  const int file = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (file < 0) return found;
  for (; scan.start < scan.end; scan.start = scan.walk_end) {
    const int count = ioctl(file, _IOWR('f', 16, Scan), &scan);
    if (count < 0 || scan.walk_end <= scan.start) break;
    for (int i = 0; i < count; ++i) {
      const uint64_t size = regions[i].end - regions[i].start;
      found.all += size;
      if (regions[i].categories & kIsHuge) found.huge += size;
    }
  }
  close(file);
#else
  (void)data, (void)bytes;
#endif
  return found;
}

}  // namespace rq
