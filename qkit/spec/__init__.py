"""What can be said: formats, granularities, schemes and recipes. Data only; no torch."""

from qkit.spec.floats import BF16 as BF16
from qkit.spec.floats import E8M0 as E8M0
from qkit.spec.floats import FP4_E2M1 as FP4_E2M1
from qkit.spec.floats import FP8_E4M3 as FP8_E4M3
from qkit.spec.floats import FP8_E5M2 as FP8_E5M2
from qkit.spec.floats import FP12_E5M6 as FP12_E5M6
from qkit.spec.floats import FP16 as FP16
from qkit.spec.floats import FP32 as FP32
from qkit.spec.floats import Float as Float
from qkit.spec.formats import NF4 as NF4
from qkit.spec.formats import Codebook as Codebook
from qkit.spec.formats import Format as Format
from qkit.spec.formats import Int as Int
from qkit.spec.granularity import Granularity as Granularity
from qkit.spec.granularity import PerBlock as PerBlock
from qkit.spec.granularity import PerChannel as PerChannel
from qkit.spec.granularity import PerGroup as PerGroup
from qkit.spec.granularity import PerTensor as PerTensor
from qkit.spec.granularity import PerToken as PerToken
from qkit.spec.qspec import QSpec as QSpec
from qkit.spec.recipe import Recipe as Recipe
from qkit.spec.recipe import Rule as Rule
from qkit.spec.scheme import PRESETS as PRESETS
from qkit.spec.scheme import Scheme as Scheme
from qkit.spec.scheme import parse as parse
