// Which kernel serves a problem. Host code only: the table is tested on machines without a GPU.
#pragma once

#include <string_view>
#include <vector>

#include "problem.h"

namespace dwconv {

enum class PlanId : int {
  kFft,
  kFftGradWeight,
  kScale,
  kDirect,
  kDirectGradWeight,
  kGather,
  kGatherGradWeight,
  kToeplitzSmallPlanes,
  kToeplitzSmallPlanesPortable,
  kToeplitzNchw,
  kToeplitzNchwPortable,
  kMarchNchw,
  kMarchNchwPortable,
  kStreamNchw,
  kStreamNchwPortable,
  kBatchGradWeightNchw,
  kBatchGradWeightNchwPortable,
  kToeplitzGradWeightNchw,
  kToeplitzGradWeightNchwPortable,
  kMarchGradWeightNchw,
  kMarchGradWeightNchwPortable,
  kStreamGradWeightNchw,
  kStreamGradWeightNchwPortable,
  kToeplitzLarge,
  kToeplitzChannelsLast,
  kMarchChannelsLast,
  kFlatGradWeightChannelsLast,
  kMarchGradWeightChannelsLast,
  kToeplitzGradWeightChannelsLast,
  kLargeFloat32,
  kLargeFloat32GradWeight,
  kOuterGradWeight,
  kHankelGradWeight,
  kPhases,
  kWindowsNchw,
  kColumnsGradWeight,
  kWalkGradWeightChannelsLast,
  kWindowsChannelsLast,
  kGeneric,
};

struct Plan {
  PlanId id;
  const char* name;
  const char* reason;              // why it is taken, for people
  bool (*claims)(const Problem&);  // whether it is right for the problem, and pays: see claims.h
};

// The same problem without the taps that meet no image at all, on either side of a kernel wider than that: what is
// chosen and computed, unless it does not pay. Of grad_weight, where the gradients of other taps are zero, `weight` is
// left as it is.
Problem without_far_taps(const Problem& problem);

// The plans that claim the problem, in order of preference; the last one claims every problem.
std::vector<const Plan*> claimants(const Problem& problem);

// The first of them.
const Plan& choose(const Problem& problem);

// The plan of that name. Throws std::runtime_error where there is none or it does not claim the problem.
const Plan& choose(const Problem& problem, std::string_view name);

}  // namespace dwconv
