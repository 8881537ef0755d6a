"""The names of torchao's PT2E flow that qkit uses, imported without what torchao prints.

It complains about libraries for other processors and about torch's own deprecations.
"""

from __future__ import annotations

from qkit.graph.capture import quiet

with quiet():
    from torchao.quantization.pt2e import (
        DerivedObserverOrFakeQuantize as DerivedObserverOrFakeQuantize,
    )
    from torchao.quantization.pt2e.observer import ObserverBase as ObserverBase
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e as convert_pt2e
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e as prepare_pt2e
    from torchao.quantization.pt2e.quantizer import (
        DerivedQuantizationSpec as DerivedQuantizationSpec,
    )
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation as QuantizationAnnotation
    from torchao.quantization.pt2e.quantizer import QuantizationSpec as QuantizationSpec
    from torchao.quantization.pt2e.quantizer import Quantizer as Quantizer
    from torchao.quantization.pt2e.quantizer import SharedQuantizationSpec as SharedQuantizationSpec
