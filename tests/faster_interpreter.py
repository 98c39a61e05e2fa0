"""Triton's interpreter, with the same results in half the time.

Most of what it takes for kernels as small as those of the tests is the making of Python objects: types and
shapes are made anew for each value. They are few: here each is made once.
"""

import functools
import importlib
import inspect
import math
from typing import Any


def _types_once(core: Any) -> None:
    """Types of blocks and shapes of tensors: nobody changes them."""
    make_type, types, shapes = core.block_type.__init__, {}, {}

    def block_type(self, element_ty, shape):
        key = (element_ty.name, *[n.value if isinstance(n, core.constexpr) else n for n in shape])
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key])

    def tensor(self, handle, type):
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in shapes:
            shapes[shape] = core.constexpr(math.prod(shape)), core.tuple([core.constexpr(n) for n in shape])
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = shapes[shape]

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor


def _numpy_types_once(interpreter: Any) -> None:
    make, made = interpreter._get_np_dtype, {}

    def numpy_type(dtype):
        if dtype.name not in made:
            made[dtype.name] = make(dtype)
        return made[dtype.name]

    interpreter._get_np_dtype = numpy_type


def _patches_once(interpreter: Any) -> None:
    """Its patches of the language, once for each launch and module of functions.

    By itself it goes through all of the language in every call inside a kernel too, and finds it patched.
    """
    patch, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(function):
        module = id(function.__globals__)
        if module not in patched:
            patched.add(module)
            return patch(function)

    def execute_anew(self, *arguments, **named):
        patched.clear()
        return execute(self, *arguments, **named)

    is_builtin = interpreter.tl.core.is_builtin

    @functools.cache
    def builtins_of(package):
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtins(package, builder, scope):
        for name in builtins_of(package):
            member = getattr(package, name)
            if is_builtin(member):  # not patched by way of another name of the package
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtins
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, execute_anew


def interpret_faster() -> None:
    """Changes Triton's interpreter for this process; to be called before the first kernel."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    _types_once(interpreter.tl.core)
    _numpy_types_once(interpreter)
    _patches_once(interpreter)
    # integers wrap, as on GPUs: by itself it computes each sum and product of 32 bits again in 64
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
