"""Distillation: what a student learns from a teacher. :mod:`qkit.flows.distill` trains with it."""

from qkit.distill.losses import attention_loss as attention_loss
from qkit.distill.losses import feature_loss as feature_loss
from qkit.distill.losses import hard_and_soft as hard_and_soft
from qkit.distill.losses import soft_targets as soft_targets
from qkit.distill.match import Match as Match
from qkit.distill.match import Matched as Matched
from qkit.distill.student import blocks_of as blocks_of
from qkit.distill.student import keep_layers as keep_layers
from qkit.distill.student import layer_map as layer_map
