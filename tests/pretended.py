"""A pretended CUDA device, so that device code runs and is measured on machines without a GPU.

Inside ``with pretended() as log:`` torch reports one CUDA device. Its tensors (:class:`DeviceTensor`) hold values in
CPU memory and compute with CPU kernels, but behave as CUDA tensors do:

* an operation that mixes them with CPU tensors, or that draws from a CPU generator, raises :class:`DeviceError`;
* ``numpy()`` raises, and ``torch.load`` of a file with such tensors raises without ``map_location``;
* autocast for ``cuda`` casts what CUDA's autocast casts; the device has a generator of its own.

``log`` counts by operation and line of this repository: kernel launches, waits of the host for the device, uploads, and
operations whose CUDA kernels do not repeat bit for bit.

How it works: to C++ a :class:`DeviceTensor` is a ``meta`` tensor that has CUDA's dispatch keys, so that neither
autograd nor an allocator asks the driver. A dispatch mode computes every operation on the CPU values. This uses private
names of torch; :func:`reason_to_skip` tells where they differ. Streams do nothing, and time and memory are not those of
a GPU.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parents[1]
ROOMS = tuple(f"{ROOT / name}/" for name in ("condense", "methods", "benchmarks", "tests"))


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NO_LAUNCH = _words(
    """empty empty_strided empty_like new_empty new_empty_strided lift_fresh detach _unsafe_view _local_scalar_dense
    is_same_size sym_size resize_ set_"""
)
"""Operations besides views that launch no kernel."""

WAITS = _words(
    """_local_scalar_dense nonzero masked_select _unique _unique2 unique_dim unique_consecutive equal is_nonzero
    bincount histc _linalg_check_errors _linalg_eigh _linalg_svd linalg_eig linalg_lstsq"""
)
"""Operations whose result the host must have before it goes on: a value, or the size of the output."""

UNREPEATABLE = _words(
    """index_add index_add_ index_copy scatter_add scatter_add_ put put_ bincount histc kthvalue
    embedding_dense_backward grid_sampler_2d_backward grid_sampler_3d_backward upsample_linear1d_backward
    upsample_bilinear2d_backward _upsample_bilinear2d_aa_backward upsample_bicubic2d_backward
    _upsample_bicubic2d_aa_backward upsample_nearest2d_backward reflection_pad1d_backward reflection_pad2d_backward
    replication_pad2d_backward adaptive_avg_pool2d_backward _adaptive_avg_pool2d_backward
    adaptive_max_pool2d_backward max_pool3d_with_indices_backward avg_pool3d_backward
    fractional_max_pool2d_backward max_unpool2d nll_loss2d_forward _cdist_backward _ctc_loss_backward"""
)
"""Operations with atomic additions on CUDA, as documented for ``torch.use_deterministic_algorithms``."""

MAY_MIX = _words("copy_ _to_copy _foreach_copy_ lift_fresh index _unsafe_index index_put index_put_")
"""Operations that take tensors of several devices; indices may lie on the CPU."""

DRAWING = ("rand", "normal", "bernoulli", "uniform", "multinomial", "native_dropout", "exponential", "poisson")
"""How the names of operations begin that draw random numbers."""

PRODUCTS = _words("convolution convolution_backward mm bmm addmm")

LOWERED = _words(
    """conv1d conv2d conv3d convolution conv_transpose2d linear matmul mm mv bmm addmm addmv baddbmm addbmm einsum prelu
    scaled_dot_product_attention linalg_multi_dot chain_matmul"""
)
"""Operations that autocast for CUDA computes in the lower precision."""

RAISED = _words(
    """softmax.int log_softmax.int layer_norm group_norm nll_loss nll_loss_nd nll_loss2d cosine_similarity mse_loss
    l1_loss smooth_l1_loss huber_loss kl_div cross_entropy_loss binary_cross_entropy_with_logits cosine_embedding_loss
    exp expm1 log log2 log10 log1p rsqrt reciprocal pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar sum sum.dim_IntList
    prod prod.dim_int cumsum cumprod norm.Scalar norm.ScalarOpt_dim dist cdist pdist renorm logsumexp softplus sinh cosh
    tan acos asin erfinv"""
)
"""Operations that it computes in float32."""


class DeviceError(RuntimeError):
    """What a CUDA device would refuse."""


class Log:
    """Counts of what the device did since :meth:`clear`, each a counter by ``operation @ file:line``."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Starts all counts again."""
        self.launches: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()
        self.uploads: collections.Counter[str] = collections.Counter()
        self.unrepeatable: collections.Counter[str] = collections.Counter()
        self.products: collections.Counter[str] = collections.Counter()
        """Convolutions and matrix products by ``operation dtype``."""


_log = Log()
_generator = torch.Generator()


@functools.cache
def _place_in_repository(filename: str) -> str | None:
    path = filename if filename.startswith("/") else str(Path(filename).resolve())
    if path == __file__ or not path.startswith(ROOMS):
        return None
    return path[len(str(ROOT)) + 1 :]


def _here() -> str:
    """The innermost line of the repository that is being executed."""
    frame = sys._getframe(1)
    while frame is not None:
        place = _place_in_repository(frame.f_code.co_filename)
        if place:
            return f"{place}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"


class DeviceTensor(Tensor):
    """A tensor of the pretended device; ``values`` is a CPU tensor of the same shape, strides and dtype."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor, requires_grad: bool = False) -> DeviceTensor:
        shell = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="meta")
        keys = {"dispatch_device": False, "device_for_backend_keys": CUDA}
        made = Tensor._make_subclass(cls, shell, requires_grad, **keys)
        made.values = values
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.values!r})"

    def get_device(self) -> int:
        return 0

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """As ``Tensor.to``. To C++ the device is another one, so it must be told here when there is nothing to do."""
        if isinstance(args[0] if args else kwargs.get("other"), Tensor):
            other = args[0] if args else kwargs["other"]
            return self.to(device=other.device, dtype=other.dtype)
        options = {name: value for name, value in kwargs.items() if name != "copy"}
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **options)
        stays = device is None or device.type == "cuda"
        in_layout = layout is None or self.values.is_contiguous(memory_format=layout)
        if stays and in_layout and dtype in (None, self.dtype) and not kwargs.get("copy"):
            return self
        return Tensor.to(self, *args, **kwargs)

    def cuda(self, *_: Any, **__: Any) -> Tensor:
        return self

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if not self.is_leaf:
            raise RuntimeError("only leaf tensors support deepcopy")
        if id(self) not in memo:
            memo[id(self)] = made = DeviceTensor(self.values.clone(), self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                made._is_param = True
            if self.grad is not None:
                made.grad = self.grad.__deepcopy__(memo)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        values = self.values.detach()
        _saved[values.untyped_storage().data_ptr()] = values
        rebuild, parts = values.__reduce_ex__(protocol)
        return rebuild, (*parts[:4], self.requires_grad, *parts[5:])


_saved: dict[int, Tensor] = {}
"""Values that were pickled from the device, by the address by which torch.save asks for their location."""


def _tag(storage: Any) -> str | None:
    return "cuda:0" if storage.device.type == "cpu" and storage.data_ptr() in _saved else None


def _restore(storage: Any, location: str) -> Any:
    if location.startswith("cuda"):
        raise DeviceError("torch.load of tensors saved on CUDA without map_location")
    return None


class _Facts:
    """What the device needs to know of an operation."""

    def __init__(self, func: Any) -> None:
        arguments = func._schema.arguments
        self.name = func._schema.name.removeprefix("aten::")
        self.written = [
            (position, argument.name)
            for position, argument in enumerate(arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        self.launches = self.name not in NO_LAUNCH and not func.is_view
        self.indexes = "index" in self.name and self.name in MAY_MIX
        # A pointwise operation takes CPU scalars; so do these.
        self.takes_scalars = torch.Tag.pointwise in func.tags or self.name.rstrip("_") in (
            "where",
            "masked_fill",
            "fill",
        )
        self.draws = self.name.startswith(DRAWING)
        self.takes_generator = any(argument.name == "generator" for argument in arguments)


_facts = functools.cache(_Facts)


def _leaves(x: Any) -> Iterator[Any]:
    if isinstance(x, (list, tuple)):
        for part in x:
            yield from _leaves(part)
    elif isinstance(x, dict):
        yield from _leaves(tuple(x.values()))
    else:
        yield x


def _mapped(function: Callable[[Any], Any], x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return type(x)([_mapped(function, part) for part in x])
    if isinstance(x, dict):
        return {name: _mapped(function, part) for name, part in x.items()}
    return function(x)


def _values(x: Any) -> Any:
    if isinstance(x, DeviceTensor):
        return x.values
    return torch.device("cpu") if isinstance(x, torch.device) else x


class Graph:
    """In place of ``torch.cuda.CUDAGraph``: the operations of a block, made again on the same memory by a replay."""

    recording: Graph | None = None

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        Graph.recording = self
        try:
            yield
        finally:
            Graph.recording = None

    def replay(self) -> None:
        """Makes the recorded operations again. Their results, and only these, have new values."""
        _log.launches["replay"] += 1
        with torch._C._DisableTorchDispatch(), torch.no_grad():
            for func, args, kwargs, made in self.calls:
                for old, new in zip(_leaves(made), _leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Refuses what CUDA refuses, counts, and computes on the values."""
    tensors, generators = [], []
    for x in _leaves((args, kwargs)):
        if isinstance(x, Tensor):
            tensors.append(x)
        elif isinstance(x, torch.Generator):
            generators.append(x)
    device = kwargs.get("device")
    on_device = any(isinstance(x, DeviceTensor) for x in tensors)
    # `new_zeros` and the like pass on the device that C++ sees.
    result_on_device = on_device if device is None else torch.device(device).type in ("cuda", "meta")
    is_pinned = kwargs.get("pin_memory", False)
    if is_pinned:
        kwargs = {**kwargs, "pin_memory": False}
    if not on_device and not result_on_device:
        made = func(*args, **kwargs)
        if is_pinned:
            made.is_page_locked = True
        return made
    facts = _facts(func)
    if facts.name == "prim::device":
        return CUDA
    _refuse(facts, tensors, args, generators)
    _count(facts, args, kwargs, on_device, result_on_device)
    plain_args, plain_kwargs = _mapped(_values, args), _mapped(_values, kwargs)
    if facts.draws:
        with _device_draws(facts, plain_kwargs, generators):
            made = func(*plain_args, **plain_kwargs)
    else:
        made = func(*plain_args, **plain_kwargs)
    if Graph.recording is not None:
        if facts.draws:
            raise DeviceError(f"{facts.name}: a graph that draws random numbers is not pretended, at {_here()}")
        Graph.recording.calls.append((func, plain_args, plain_kwargs, made))
    written = [x for position, name in facts.written for x in _leaves(_argument(args, kwargs, position, name))]
    for x in written:
        if isinstance(x, DeviceTensor) and x.shape != x.values.shape:
            raise NotImplementedError(f"the pretended device cannot change a shape in place ({func})")

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        for given in written:  # in place, or out=
            if _values(given) is x:
                return given
        return DeviceTensor(x) if result_on_device else x

    return _mapped(wrap, made)


def _argument(args: Any, kwargs: dict[str, Any], position: int, name: str) -> Any:
    return args[position] if position < len(args) else kwargs.get(name)


def _refuse(facts: _Facts, tensors: list[Tensor], args: Any, generators: list[torch.Generator]) -> None:
    elsewhere = [x for x in tensors if not isinstance(x, DeviceTensor)]
    mixes = len(elsewhere) not in (0, len(tensors))
    if mixes and facts.name not in MAY_MIX and any(x.dim() or not facts.takes_scalars for x in elsewhere):
        raise DeviceError(f"{facts.name}: expected all tensors on one device, but found cuda:0 and cpu at {_here()}")
    if facts.indexes and not isinstance(args[0], DeviceTensor):
        raise DeviceError(f"{facts.name}: indices on cuda:0 into a tensor on cpu at {_here()}")
    if any(generator is not _generator for generator in generators):
        raise DeviceError(f"{facts.name}: expected a generator of cuda, but found one of cpu at {_here()}")


def _count(facts: _Facts, args: Any, kwargs: dict[str, Any], on_device: bool, result_on_device: bool) -> None:
    name = facts.name
    here = f"{name} @ {_here()}"
    waits, uploads = _log.waits.total(), _log.uploads.total()
    _count_operation(facts, name, here, args, kwargs, on_device, result_on_device)
    if Graph.recording is not None and (_log.waits.total(), _log.uploads.total()) != (waits, uploads):
        raise DeviceError(f"operation not permitted when stream is capturing: {here}")


def _count_operation(
    facts: _Facts, name: str, here: str, args: Any, kwargs: dict[str, Any], on_device: bool, result_on_device: bool
) -> None:
    if facts.launches and Graph.recording is None:
        _log.launches[here] += 1
    if name in WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        _log.waits[here] += 1
    if name in UNREPEATABLE:
        _log.unrepeatable[here] += 1
    if name in PRODUCTS:
        _log.products[f"{name} {args[0].dtype}"] += 1
    if facts.indexes:
        indices = [i for i in args[1] if isinstance(i, Tensor)]
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            _log.waits[f"boolean {here}"] += 1
        if any(not isinstance(i, DeviceTensor) for i in indices):
            _log.waits[f"CPU indices {here}"] += 1
            _log.uploads[here] += 1
    if name == "_to_copy":
        _count_copy(here, args[0], on_device, result_on_device, kwargs.get("non_blocking", False))
    elif name == "copy_":
        is_on, goes_on = isinstance(args[1], DeviceTensor), isinstance(args[0], DeviceTensor)
        _count_copy(here, args[1], is_on, goes_on, _argument(args, kwargs, 2, "non_blocking") or False)


def _count_copy(here: str, source: Tensor, is_on: bool, goes_on: bool, non_blocking: bool) -> None:
    """A copy between host and device waits unless it is ``non_blocking``, and up also unless memory is page-locked."""
    if is_on == goes_on:
        return
    if goes_on:
        _log.uploads[here] += 1
    if not non_blocking or (goes_on and not getattr(source, "is_page_locked", False)):
        _log.waits[here] += 1


@contextlib.contextmanager
def _device_draws(facts: _Facts, kwargs: dict[str, Any], generators: list[torch.Generator]) -> Iterator[None]:
    """Random numbers come from the device's generator, also in kernels that take none."""
    if generators:
        yield
    elif facts.takes_generator:
        kwargs["generator"] = _generator
        yield
    else:
        host = torch.random.default_generator
        before = host.get_state()
        host.set_state(_generator.get_state())
        try:
            yield
        finally:
            _generator.set_state(host.get_state())
            host.set_state(before)


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def _autocast_rules() -> torch.library.Library:
    """Autocast for CUDA, whose own rules ask for the device that C++ sees, once more in Python."""
    library = torch.library.Library("aten", "IMPL", "AutocastCUDA")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

    def rule(op: Any, lowers: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype("cuda") if lowers else torch.float32

            def cast(x: Any) -> Any:
                is_ours = isinstance(x, DeviceTensor) or (
                    isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x)
                )
                eligible = is_ours and x.is_floating_point() and x.dtype not in (torch.float64, dtype)
                return x.to(dtype) if eligible else x

            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(*_mapped(cast, args), **_mapped(cast, kwargs))

        return call

    for names, lowers in ((LOWERED, True), (RAISED, False)):
        for name in names:
            packet, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
            if op is not None:
                library.impl(op, rule(op, lowers), allow_override=True)
    return library


class _Stream:
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def synchronize(self) -> None: ...

    def is_capturing(self) -> bool:
        return False


def _torch_cuda(capability: tuple[int, int]) -> dict[str, Any]:
    """What takes the place of names of ``torch.cuda``."""
    card = SimpleNamespace(
        name="pretended", major=capability[0], minor=capability[1], total_memory=80 << 30, multi_processor_count=132
    )
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: card.name,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: card,
        "is_bf16_supported": lambda *_: capability[0] >= 8,
        "mem_get_info": lambda device=None: (60 << 30, 80 << 30),
        "memory_allocated": lambda device=None: 1 << 19,
        "max_memory_allocated": lambda device=None: 1 << 20,
        "max_memory_reserved": lambda device=None: 1 << 20,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "init": lambda: None,
        "synchronize": lambda device=None: _log.waits.update([f"synchronize @ {_here()}"]),
        "manual_seed": _generator.manual_seed,
        "manual_seed_all": _generator.manual_seed,
        "get_rng_state": lambda device=None: _generator.get_state(),
        "set_rng_state": lambda state, device=None: _generator.set_state(state),
        "Stream": _Stream,
        "current_stream": lambda device=None: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: Graph.recording is not None,
        "CUDAGraph": Graph,
        "graph": lambda graph, *_, **__: graph.record(),
    }


def _on_cpu_first(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.tensor`` and ``torch.as_tensor`` for the device: C++ would allocate there. The copy waits, as on CUDA."""

    def call(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if isinstance(data, DeviceTensor) and make is torch_as_tensor:
            return data.to(device=device or CUDA, **kwargs)
        if device is not None and torch.device(device).type == "cuda":
            return make(data, *args, **kwargs).to(device)
        return make(data, *args, device=device, **kwargs)

    return call


torch_as_tensor, _tensor_to = torch.as_tensor, Tensor.to


def _to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``Tensor.to``, where ``cuda`` means ``cuda:0``: C++ would ask the driver for the current device."""

    def numbered(x: Any) -> Any:
        is_cuda = (isinstance(x, str) and x.startswith("cuda")) or (isinstance(x, torch.device) and x.type == "cuda")
        return CUDA if is_cuda else x

    return _tensor_to(self, *map(numbered, args), **{name: numbered(value) for name, value in kwargs.items()})


_to_empty = torch.nn.Module.to_empty


def _to_empty_without_swaps(self: torch.nn.Module, **options: Any) -> torch.nn.Module:
    """``Module.to_empty``, which replaces the parameters of a module without memory as it does elsewhere."""
    torch.__future__.set_swap_module_params_on_conversion(False)
    try:
        return _to_empty(self, **options)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(True)


def _pin_memory(self: Tensor, *_: Any) -> Tensor:
    if isinstance(self, DeviceTensor):
        raise DeviceError(f"only tensors on the CPU can be pinned, at {_here()}")
    made = self.detach().clone()
    made.is_page_locked = True
    return made


@contextlib.contextmanager
def pretended(capability: tuple[int, int] = (9, 0)) -> Iterator[Log]:
    """Torch has the pretended device in this block.

    Args:
        capability: compute capability of the device; below 8 it has no bf16.

    Yields:
        What the device did, from now on.
    """
    from torch.optim import optimizer
    from torch.serialization import _package_registry

    _log.clear()
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    lifts = torch._C._only_lift_cpu_tensors()
    packages = list(_package_registry)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        torch.__future__.set_swap_module_params_on_conversion(True)  # `module.to` keeps its parameters, as on CUDA
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifts)
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(_package_registry.__setitem__, slice(None), packages)
        torch.serialization.register_package(5, _tag, _restore)
        stack.callback(_saved.clear)
        patches: list[tuple[Any, dict[str, Any]]] = [
            (torch.cuda, _torch_cuda(capability)),
            (torch.nn.Module, {"to_empty": _to_empty_without_swaps}),
            (torch.accelerator, {"current_stream": lambda *_, **__: _Stream()}),
            (torch, {"tensor": _on_cpu_first(torch.tensor), "as_tensor": _on_cpu_first(torch.as_tensor)}),
            (Tensor, {"to": _to, "cuda": lambda self, *_, **__: self.to(CUDA), "pin_memory": _pin_memory}),
            (optimizer, {"_foreach_supported_types": [*optimizer._foreach_supported_types, DeviceTensor]}),
        ]
        for owner, names in patches:
            for name, value in names.items():
                stack.enter_context(mock.patch.object(owner, name, value))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each rule replaces one of torch's
            stack.callback(_autocast_rules()._destroy)
        stack.enter_context(_Device())
        yield _log


@functools.cache
def reason_to_skip() -> str:
    """Why this version of torch cannot pretend; an empty string if it can."""
    if torch.cuda.is_available():
        return "this machine has a CUDA device; see python -m condense.benchmarks.gpu_check"
    try:
        with pretended():
            net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2)).to("cuda")
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
            with torch.autocast("cuda", torch.bfloat16):
                loss = net(torch.randn(2, 1, 4, 4, device="cuda")).square().mean()
            loss.backward()
            optimizer.step()
            torch.func.vmap(torch.func.grad(lambda x: (x * x).sum()))(torch.ones(2, 3, device="cuda")).cpu()
        return ""
    except Exception as fault:
        return f"torch {torch.__version__} has other private hooks: {type(fault).__name__}: {fault}"
