"""The training loop that quantization-aware training, distillation and prune-and-tune share.

from qkit.flows.train import TrainOptions, labelled, train
done = train(model, labelled(x, y), val=labelled(xv, yv), options=TrainOptions(epochs=5))
done.history[-1]["val_accuracy"]
"""

from qkit.flows.train.loop import Trained as Trained
from qkit.flows.train.loop import train as train
from qkit.flows.train.options import TrainOptions as TrainOptions
from qkit.flows.train.request import TrainRequest as TrainRequest
from qkit.flows.train.samples import Batch as Batch
from qkit.flows.train.samples import TrainData as TrainData
from qkit.flows.train.samples import labelled as labelled
from qkit.flows.train.samples import stream_of as stream_of
from qkit.flows.train.score import evaluate as evaluate
from qkit.flows.train.score import scores as scores
from qkit.flows.train.sources import open_train as open_train
