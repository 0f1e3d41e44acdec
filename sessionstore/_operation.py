"""``@operation`` and ``@feed``: written once, typed for each who carries them out.

The decorated method builds a request, or a feed of pages, and does no I/O. Seen on a
``SyncExecutor`` it is a method that returns the result, or an iterator; on an ``AsyncExecutor`` a
coroutine function, or a function that returns an asynchronous iterator; on a ``BatchExecutor``,
which only notes it, a method that returns its outcome to be. Type checkers infer all from the one
definition, and go-to-definition lands on it.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import (
    Any,
    Concatenate,
    Generic,
    ParamSpec,
    TypeVar,
    get_args,
    get_origin,
    overload,
)

from sessionstore._call import Call, Feed, Live, Request, Steps
from sessionstore.errors import SessionStoreError

logger = logging.getLogger("sessionstore")

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C")


class SyncExecutor:
    """Carries out requests, blocking."""

    def execute(self, request: Request[T]) -> T:
        """Carry out a request and return its result."""
        raise NotImplementedError  # each executor has its own

    def carry(self, steps: Steps[T]) -> T:
        """Carry out step after step and return the result of all."""
        raise NotImplementedError  # each executor has its own

    def drain(self, feed: Feed[T, C]) -> Iterator[T]:
        """Give the items of a feed, page after page."""
        raise NotImplementedError  # each executor has its own

    def follow(self, feed: Live[T, C]) -> Iterator[T]:
        """Give the items of a feed, and wait for more."""
        raise NotImplementedError  # each executor has its own


class AsyncExecutor:
    """Carries out requests on the event loop."""

    def execute(self, request: Request[T]) -> Coroutine[Any, Any, T]:
        """Carry out a request and return its result."""
        raise NotImplementedError  # each executor has its own

    async def carry(
        self, steps: Steps[T], execute: Callable[[Request[Any]], Awaitable[Any]] | None = None
    ) -> T:
        """Carry out step after step, each with ``execute``, and return the result of all."""
        raise NotImplementedError  # each executor has its own

    def drain(self, feed: Feed[T, C]) -> AsyncIterator[T]:
        """Give the items of a feed, page after page."""
        raise NotImplementedError  # each executor has its own

    def follow(self, feed: Live[T, C]) -> AsyncIterator[T]:
        """Give the items of a feed, and wait for more."""
        raise NotImplementedError  # each executor has its own


class BatchExecutor:
    """Notes requests, to be carried out together."""

    def note(self, operation: str, request: Request[T]) -> Outcome[T]:
        """Note a request; what will become of it."""
        raise NotImplementedError  # the batches have it


class Outcome(Generic[T]):
    """What becomes of one operation of a batch; known once the batch has been sent."""

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self._error: Exception | None = None
        self._result: Any = None
        self._is_known = self._is_looked_at = False

    def __repr__(self) -> str:
        error = self._error
        state = "done" if error is None else f"{type(error).__name__}: {error}"
        return f"<{self.operation} in a batch: {state if self._is_known else 'not sent yet'}>"

    @property
    def is_known(self) -> bool:
        """Whether the batch has been sent, and this operation answered or given up."""
        return self._is_known

    @property
    def error(self) -> Exception | None:
        """What the operation failed with; None if it was carried out.

        Raises:
            SessionStoreError: the batch has not been sent.
        """
        if not self._is_known:
            raise SessionStoreError(
                f"the batch with this {self.operation} has not been sent, or was interrupted"
            )
        self._is_looked_at = True
        return self._error

    def result(self) -> T:
        """What the operation returns; raises what it raises.

        Raises:
            SessionStoreError: the batch has not been sent.
        """
        if self.error is not None:
            raise self.error
        result: T = self._result
        return result

    def succeed(self, result: T) -> None:
        """It was carried out."""
        self._is_known, self._result = True, result

    def fail(self, error: Exception) -> None:
        """It was refused, or could not be carried out."""
        # Without the frames it came through: they hold this outcome, which would outlive its user.
        self._is_known, self._error = True, error.with_traceback(None)

    def __del__(self) -> None:
        if self._error is not None and not self._is_looked_at:
            logger.warning(
                "%s in a batch failed, and nobody has looked at its outcome: %s",
                self.operation, self._error,
            )  # fmt: skip


class _Shown:
    """What both decorators do: show the builder as a method, under its own name and signature."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self.__doc__ = build.__doc__
        self.__name__ = build.__name__
        self.__wrapped__ = build
        self._signatures: dict[Any, inspect.Signature] = {}

    def __get__(self, store: Any, owner: Any) -> Any:
        raise NotImplementedError  # each decorator has its own; none looks at the owner

    @functools.cached_property
    def _unbound(self) -> Callable[..., Any]:
        """The method as the class shows it: for ``help``, for mocks, for ``SessionStore.ping``."""

        def method(store: Any, *args: Any, **kwargs: Any) -> Any:
            return self.__get__(store, SyncExecutor)(*args, **kwargs)

        self._dress(method, None)
        return method

    def _dress(self, method: Any, wrapper: Any) -> None:
        """Give the method the builder's name and text, and an honest signature."""
        functools.update_wrapper(method, self.__wrapped__)
        method.__signature__ = self._signature(wrapper)

    def _signature(self, wrapper: Any) -> inspect.Signature:
        """The method's, its result in this wrapper: ``Iterator``, ``Outcome`` …, or in none.

        It has neither ``self`` (mocks made from the class count on that) nor a request in it. Made
        once, for that takes 150 µs, and each batch looks its methods up anew.
        """
        if wrapper not in self._signatures:
            signature = inspect.signature(self.__wrapped__, eval_str=True)
            _, *parameters = signature.parameters.values()
            result = _first_argument(signature.return_annotation)
            self._signatures[wrapper] = signature.replace(
                parameters=parameters,
                return_annotation=result if wrapper is None else wrapper[result],
            )
        return self._signatures[wrapper]

    def _show(
        self,
        method: Any,
        store: SyncExecutor | AsyncExecutor | BatchExecutor,
        wrapper: Any = None,
    ) -> None:
        self._dress(method, wrapper)
        if inspect.getattr_static(type(store), self.__name__, None) is self:
            # Found there from now on, without passing here again. Not if a subclass overrides it.
            store.__dict__[self.__name__] = method


def _first_argument(annotation: Any) -> Any:
    """T, of ``Call[T]``, of ``Feed[T, …]``, or of the union ``Request[T]``."""
    first = get_args(annotation)[0]
    return first if get_origin(annotation) in (Call, Feed, Live) else _first_argument(first)


class operation(_Shown, Generic[P, T]):  # noqa: N801  a decorator
    """Show a builder of requests as a method: blocking, awaitable, or noted in a batch."""

    def __init__(self, build: Callable[Concatenate[Any, P], Request[T]]) -> None:
        super().__init__(build)
        self.build = build

    @overload
    def __get__(self, store: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, store: SyncExecutor, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, store: AsyncExecutor, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    @overload
    def __get__(self, store: BatchExecutor, owner: type) -> Callable[P, Outcome[T]]: ...
    def __get__(
        self, store: SyncExecutor | AsyncExecutor | BatchExecutor | None, owner: type
    ) -> Callable[..., Any]:
        if store is None:
            return self._unbound
        build = self.build
        if isinstance(store, BatchExecutor):
            return self._noted_by(store)
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
        self._show(bound, store)
        return bound

    def _noted_by(self, batch: BatchExecutor) -> Callable[P, Outcome[T]]:
        build = self.build

        def note(*args: P.args, **kwargs: P.kwargs) -> Outcome[T]:
            return batch.note(self.__name__, build(batch, *args, **kwargs))

        self._show(note, batch, Outcome)
        return note


class feed(_Shown, Generic[P, T]):  # noqa: N801  a decorator
    """Show a builder of feeds as a method that returns an iterator, blocking or asynchronous."""

    def __init__(self, build: Callable[Concatenate[Any, P], Feed[T, Any]]) -> None:
        super().__init__(build)
        self.build = build

    @overload
    def __get__(self, store: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, store: SyncExecutor, owner: type) -> Callable[P, Iterator[T]]: ...
    @overload
    def __get__(self, store: AsyncExecutor, owner: type) -> Callable[P, AsyncIterator[T]]: ...
    def __get__(
        self, store: SyncExecutor | AsyncExecutor | BatchExecutor | None, owner: type
    ) -> Callable[..., Any] | Callable[P, Iterator[T]] | Callable[P, AsyncIterator[T]]:
        if store is None:
            return self._unbound
        if isinstance(store, BatchExecutor):
            raise AttributeError(  # noqa: TRY004  it has no such attribute
                f"a batch does not iterate: call {self.__name__} of the store"
            )
        build, drain, follow = self.build, store.drain, store.follow

        def iterate(*args: P.args, **kwargs: P.kwargs) -> Any:
            # Built at once, so that a bad argument is refused by the call itself.
            feed = build(store, *args, **kwargs)
            return follow(feed) if isinstance(feed, Live) else drain(feed)

        self._show(iterate, store, AsyncIterator if isinstance(store, AsyncExecutor) else Iterator)
        return iterate
