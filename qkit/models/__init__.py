"""Loading a model safely from any kind of file, and the inputs to run it on."""

from qkit.models.factory import resolve_callable as resolve_callable
from qkit.models.factory import resolve_factory as resolve_factory
from qkit.models.factory import skeleton as skeleton
from qkit.models.images import ImageOptions as ImageOptions
from qkit.models.images import drawn as drawn
from qkit.models.images import image_files as image_files
from qkit.models.images import parse_images as parse_images
from qkit.models.images import read_image as read_image
from qkit.models.infer import infer as infer
from qkit.models.inputs import Inputs as Inputs
from qkit.models.inputs import as_example as as_example
from qkit.models.inputs import batches as batches
from qkit.models.inputs import flatten as flatten
from qkit.models.inputs import from_npz as from_npz
from qkit.models.inputs import leading as leading
from qkit.models.inputs import parse_input_spec as parse_input_spec
from qkit.models.inputs import run as run
from qkit.models.inputs import split as split
from qkit.models.load import load as load
from qkit.models.loaded import Loaded as Loaded
from qkit.models.loaded import Source as Source
from qkit.models.program_safety import check_program as check_program
from qkit.models.sniff import sniff as sniff
