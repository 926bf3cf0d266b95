// The schemas are defined in mmdet_moe/ops/library.py, which also holds the PyTorch reference; these
// implementations take precedence over it for CPU tensors.
#include "ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(mmdet_moe, CPU, m) {
  m.impl("sort_routes", TORCH_BOX(&mmdet_moe::cpu::sort_routes));
  m.impl("dispatch", TORCH_BOX(&mmdet_moe::cpu::dispatch));
  m.impl("dispatch_backward", TORCH_BOX(&mmdet_moe::cpu::dispatch_backward));
  m.impl("combine", TORCH_BOX(&mmdet_moe::cpu::combine));
  m.impl("combine_backward", TORCH_BOX(&mmdet_moe::cpu::combine_backward));
  m.impl("entmax15", TORCH_BOX(&mmdet_moe::cpu::entmax15));
  m.impl("entmax15_backward", TORCH_BOX(&mmdet_moe::cpu::entmax15_backward));
}
