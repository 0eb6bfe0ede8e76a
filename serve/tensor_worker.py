"""The process that owns a TensorModel: `python -m serve.tensor_worker FD`, started by serve/tensor_process.py."""

import logging
import sys
import time
import traceback

import numpy as np

from serve.protocol.tensors import NUMERIC, from_raw
from serve.tensor_model import Signature, TensorModel
from serve.worker_process import ServerLink, resolve

logger = logging.getLogger(__name__)


def warm_up(model: TensorModel) -> None:
    """One blank input of batch one, where the signature says enough to make it."""
    if all(tensor.datatype != "BYTES" and -1 not in tensor.shape[1:] for tensor in model.inputs):
        model.infer({tensor.name: np.zeros((1, *tensor.shape[1:]), NUMERIC[tensor.datatype]) for tensor in model.inputs})


def main() -> None:
    """Load, warm up, say hello, answer until the server hangs up."""
    logging.basicConfig(format="encoder worker %(process)d: %(levelname)s %(message)s")
    link = ServerLink(int(sys.argv[1]))
    try:
        model: TensorModel = resolve(link.settings["factory"])(**link.settings["arguments"])
        warm_up(model)
    except (ValueError, OSError, TypeError, RuntimeError) as error:
        if not isinstance(error, ValueError | OSError):  # those explain themselves
            logger.error("%s", traceback.format_exc())
        link.send({"failed": f"The encoder could not be loaded: {error}"})
        return
    link.send(Signature(model.inputs, model.outputs, model.content_hash or "unknown").to_dict())
    while True:
        message = link.next_message()
        began = time.perf_counter()
        try:
            inputs = {name: from_raw(name, datatype, shape, data) for name, datatype, shape, data in message["tensors"]}
            answer = {name: np.asarray(array) for name, array in model.infer(inputs).items()}
        except ValueError as error:
            link.send({"id": message["id"], "refused": str(error)})
        except Exception as error:  # the border of the process: one request fails, its reason goes to the log
            logger.error("%s", traceback.format_exc())
            link.send({"id": message["id"], "error": type(error).__name__})
        else:
            link.send({"id": message["id"], "tensors": answer, "seconds": time.perf_counter() - began})


if __name__ == "__main__":
    main()
