# ruff: noqa: F401  # importing is registering
"""The cluster mixtures of arXiv 2208.02813; a config that lists this module in ``custom_imports``
may name its classes, as ``mmdet_moe.X``."""

from projects.cluster_theory.cluster_alignment_hook import ClusterAlignmentHook
from projects.cluster_theory.cluster_patches import ClusterPatches, collate_batch
from projects.cluster_theory.filter_experts import FilterExperts
from projects.cluster_theory.normalized_gd import ExpertGroupsConstructor, NormalizedGD
from projects.cluster_theory.patch_mixture import PatchMixture
from projects.cluster_theory.patch_router import PatchRouter
from projects.cluster_theory.stop_at_loss_hook import StopAtLossHook
