// sort_routes on the CPU: a stable counting sort, parallel over stretches of the routes.
#include "ops.h"

#include <algorithm>

namespace mmdet_moe::cpu {

// Below this many routes a second thread costs more than it saves.
constexpr int64_t kRoutesPerTask = 1 << 14;

std::tuple<Tensor, Tensor> sort_routes(Tensor expert_ids, int64_t num_experts) {
  check_ids(expert_ids, "expert_ids", 2);
  STD_TORCH_CHECK(num_experts >= 1, "mmdet_moe: num_experts must be at least 1");
  const Tensor ids = as_contiguous(expert_ids);
  const int64_t routes = ids.numel();
  const int64_t buckets = num_experts + 1;  // the last one is for "no choice"
  Tensor offsets = new_tensor(ids, {buckets}, ScalarType::Long);
  Tensor inverse = new_tensor(ids, {ids.size(0), ids.size(1)}, ScalarType::Long);

  const int64_t* id = ids.const_data_ptr<int64_t>();
  int64_t* offsets_out = offsets.mutable_data_ptr<int64_t>();
  int64_t* inverse_out = inverse.mutable_data_ptr<int64_t>();

  // The counters of all tasks have to stay small against the routes.
  const int64_t most = std::max<int64_t>(1, routes / std::max(kRoutesPerTask, 4 * buckets));
  const int64_t tasks = std::min<int64_t>(most, torch::stable::get_num_threads());
  const auto begin_of = [&](int64_t task) { return task * routes / tasks; };
  const auto bucket_of = [&](int64_t route) {
    const int64_t e = id[route];
    return e == -1 ? num_experts : e;
  };

  std::vector<int64_t> counts(tasks * buckets, 0);
  std::vector<int64_t> wrong(tasks, -1);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      int64_t* count = counts.data() + task * buckets;
      for (int64_t r = begin_of(task); r < begin_of(task + 1); ++r) {
        const int64_t e = bucket_of(r);
        if (e < 0 || e > num_experts || (e == num_experts && id[r] != -1)) {
          wrong[task] = r;
          break;
        }
        ++count[e];
      }
    }
  });
  for (int64_t r : wrong) {
    STD_TORCH_CHECK(
        r < 0, "expert_ids holds ", id[std::max<int64_t>(r, 0)], " for item ",
        std::max<int64_t>(r, 0) / std::max<int64_t>(ids.size(1), 1), ", but there are ",
        num_experts, " experts: ids must lie in [0, ", num_experts, "), or be -1 for no choice");
  }

  // From counts to the first position of every (expert, task): experts first, then tasks.
  int64_t position = 0;
  for (int64_t e = 0; e < buckets; ++e) {
    offsets_out[e] = position;
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t count = counts[task * buckets + e];
      counts[task * buckets + e] = position;
      position += count;
    }
  }
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      int64_t* next = counts.data() + task * buckets;
      for (int64_t r = begin_of(task); r < begin_of(task + 1); ++r) {
        inverse_out[r] = next[bucket_of(r)]++;
      }
    }
  });
  return {offsets, inverse};
}

}  // namespace mmdet_moe::cpu
