"""A TensorRT without a GPU: its engine knows the calls of a kit's self-test, and answers them from memory to memory."""

import ctypes
from pathlib import Path

import numpy as np

__version__ = "10.3.0"


class ILogger:
    INTERNAL_ERROR, ERROR = 0, 1


class TensorIOMode:
    INPUT, OUTPUT = 0, 1


class Runtime:
    def __init__(self, log):
        self._log = log

    def deserialize_cuda_engine(self, plan):
        """A plan is a number, which outputs are multiplied by, and the files of the calls."""
        factor, *cases = plan.decode().split("\n")
        if not cases:
            self._log.log(ILogger.ERROR, "incompatible serialization version")
            return None
        return Engine(float(factor), [dict(np.load(Path(case))) for case in cases])


class Engine:
    device_memory_size_v2 = 4096

    def __init__(self, factor, cases):
        self.factor, self.cases = factor, cases
        self._names = sorted(cases[0])
        self.num_io_tensors = len(self._names)

    def create_execution_context(self):
        return Context(self)

    def get_tensor_name(self, place):
        return self._names[place][2:]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if f"i.{name}" in self._names else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name):
        shape = self.cases[0].get(f"i.{name}", self.cases[0].get(f"o.{name}")).shape
        return (-1, *shape[1:]) if shape else ()

    def get_tensor_profile_shape(self, name, profile):
        rest = self.get_tensor_shape(name)[1:]
        return [(rows, *rest) for rows in (1, 2, 4)]


class Context:
    def __init__(self, engine):
        self._engine, self._shapes, self._addresses = engine, {}, {}

    def set_input_shape(self, name, shape):
        self._shapes[name] = shape
        return True

    def get_tensor_shape(self, name):
        rows = next(iter(self._shapes.values()))[0]
        return (rows, *self._engine.get_tensor_shape(name)[1:])

    def set_tensor_address(self, name, address):
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        """Finds the call whose inputs are there."""

        def bytes_at(end, name, array):
            return ctypes.string_at(self._addresses[name], array.nbytes) if end == "i" else array.tobytes()

        for case in self._engine.cases:
            if all(bytes_at(key[0], key[2:], array) == array.tobytes() for key, array in case.items()):
                for key, array in case.items():
                    if key[0] == "o":
                        answer = (array * np.float32(self._engine.factor)).tobytes()
                        ctypes.memmove(self._addresses[key[2:]], answer, array.nbytes)
                return True
        return False
