#include <cstdlib>
#include <cstring>

#include "isa.h"

namespace hh {
extern const Kernels kernels_base;
#ifdef HH_HAS_AVX2
extern const Kernels kernels_avx2;
#endif

const Kernels& kernels() {
  static const Kernels* chosen = [] {
#ifdef HH_HAS_AVX2
    const char* want = std::getenv("HANDHOLD_ISA");
    __builtin_cpu_init();
    if (!(want && std::strcmp(want, "base") == 0) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &kernels_avx2;
#endif
    return &kernels_base;
  }();
  return *chosen;
}
}  // namespace hh

HH_API int hh_abi_version() { return 3; }
HH_API const char* hh_isa() { return hh::kernels().name; }
