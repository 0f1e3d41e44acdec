"""``@operation``: written once, typed twice.

The decorated method builds a request and does no I/O. Seen on a ``SyncExecutor`` it is a method
that returns the result; on an ``AsyncExecutor`` a coroutine function. Type checkers infer both
from the one definition, and go-to-definition lands on it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import (
    Any,
    Concatenate,
    Generic,
    ParamSpec,
    Self,
    TypeVar,
    get_args,
    get_origin,
    overload,
)

from sessionstore._call import Call, Request

P = ParamSpec("P")
T = TypeVar("T")


class SyncExecutor:
    """Carries out requests, blocking."""

    def execute(self, request: Request[T]) -> T:
        """Carry out a request and return its result."""
        raise NotImplementedError  # each executor has its own


class AsyncExecutor:
    """Carries out requests on the event loop."""

    async def execute(self, request: Request[T]) -> T:
        """Carry out a request and return its result."""
        raise NotImplementedError  # each executor has its own


class operation(Generic[P, T]):  # noqa: N801  a decorator
    """Show a builder of requests as a method, blocking or awaitable."""

    def __init__(self, build: Callable[Concatenate[Any, P], Request[T]]) -> None:
        self.build = build
        self.__doc__ = build.__doc__
        self.__name__ = build.__name__
        self.__wrapped__ = build

    @overload
    def __get__(self, store: None, owner: type) -> Self: ...
    @overload
    def __get__(self, store: SyncExecutor, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, store: AsyncExecutor, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(
        self, store: SyncExecutor | AsyncExecutor | None, owner: type
    ) -> Self | Callable[P, T] | Callable[P, Coroutine[Any, Any, T]]:
        if store is None:
            return self
        build = self.build
        bound: Callable[P, T] | Callable[P, Coroutine[Any, Any, T]]
        if isinstance(store, AsyncExecutor):
            run_async = store.execute

            async def call_async(*args: P.args, **kwargs: P.kwargs) -> T:
                return await run_async(build(store, *args, **kwargs))

            bound = call_async
        else:
            run_sync = store.execute

            def call_sync(*args: P.args, **kwargs: P.kwargs) -> T:
                return run_sync(build(store, *args, **kwargs))

            bound = call_sync
        functools.update_wrapper(bound, build)
        bound.__signature__ = self._signature  # type: ignore[union-attr]
        # Found there from now on, without passing here again.
        store.__dict__[self.__name__] = bound
        return bound

    @functools.cached_property
    def _signature(self) -> inspect.Signature:
        """The builder's signature without ``self``, returning the result, not the request."""
        signature = inspect.signature(self.build, eval_str=True)
        request = signature.return_annotation  # Call[T], or Call[T] | Snapshot[T]
        if get_origin(request) is not Call:
            request = get_args(request)[0]
        (result,) = get_args(request)
        _, *parameters = signature.parameters.values()
        return signature.replace(parameters=parameters, return_annotation=result)
