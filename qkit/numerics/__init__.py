"""What a scheme means: tensors to tensors, pure functions, one formula."""

from qkit.numerics.affine import check_finite as check_finite
from qkit.numerics.affine import choose_qparams as choose_qparams
from qkit.numerics.affine import code_dtype as code_dtype
from qkit.numerics.affine import dequantize as dequantize
from qkit.numerics.affine import dequantize_blocks as dequantize_blocks
from qkit.numerics.affine import qparams_from_range as qparams_from_range
from qkit.numerics.affine import quantize as quantize
from qkit.numerics.affine import quantize_minmax as quantize_minmax
from qkit.numerics.affine import scale_dtype as scale_dtype
from qkit.numerics.auto import Choice as Choice
from qkit.numerics.auto import auto as auto
from qkit.numerics.cast import CastLoss as CastLoss
from qkit.numerics.cast import cast as cast
from qkit.numerics.cast import cast_codes as cast_codes
from qkit.numerics.fake import fake_quantize as fake_quantize
from qkit.numerics.observers import OBSERVERS as OBSERVERS
from qkit.numerics.observers import Observer as Observer
from qkit.numerics.tensors import QParams as QParams
from qkit.numerics.tensors import QTensor as QTensor
from qkit.numerics.tensors import no_scale as no_scale
