"""Distillation: what a student learns from a teacher. :mod:`qkit.flows.distill` trains with it."""

from qkit.distill.losses import hard_and_soft as hard_and_soft
from qkit.distill.losses import soft_targets as soft_targets
