"""A stand-in for a model's server that really is on a GPU: a CUDA context and some memory, until it is signalled.

    python gpuholder.py MIB      prints "there" once the driver has given the memory; exit code 3: CUDA refuses

By the driver's own library, libcuda.so.1, which is where a driver is: nothing else is installed for it.
"""

import ctypes
import signal
import sys

# By these names since CUDA 3.2, nowadays as then.
CALLS = ("cuInit", "cuDeviceGet", "cuCtxCreate_v2", "cuMemAlloc_v2")


def main(mib: int) -> int:
    cuda = ctypes.CDLL("libcuda.so.1")
    device, context, memory = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
    arguments = (
        (0,), (ctypes.byref(device), 0), (ctypes.byref(context), 0, device),
        (ctypes.byref(memory), ctypes.c_size_t(mib << 20)),
    )  # fmt: skip
    for name, given in zip(CALLS, arguments, strict=True):
        if (code := getattr(cuda, name)(*given)) != 0:
            print(f"{name} answers {code}", file=sys.stderr)
            return 3
    print("there", flush=True)
    signal.sigwait({signal.SIGUSR1})  # SIGTERM and SIGKILL end it as they end anybody
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
