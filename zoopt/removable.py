"""What can be undone: by `remove()`, or by leaving a `with` block."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


class Removable:
    """A handle whose `with` block ends with `remove()`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"a {type(self).__name__} cannot be copied or pickled, since the hooks that it has set "
            f"are not; call remove(), copy model and optimizer, and make another over the copies"
        )

    def remove(self) -> None:
        """Undo it."""
        raise NotImplementedError
