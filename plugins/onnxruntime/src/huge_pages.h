// Memory in huge pages: a kernel that reads weights once has a TLB miss at every small page.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace rq {

// For memory that has not been read yet, so that the contents of a mapped file are read into huge pages (Linux 6.16 and newer on
// ext4, older versions on XFS). It has no effect elsewhere.
inline void prefer_huge_pages(const void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const size_t skipped = (kPage - reinterpret_cast<uintptr_t>(data) % kPage) % kPage;
  const size_t whole = skipped < bytes ? (bytes - skipped) / kPage * kPage : 0;
  if (whole > 0) (void)madvise(static_cast<char*>(const_cast<void*>(data)) + skipped, whole, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace rq
