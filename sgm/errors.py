"""What users are told of errors; imports no library, so that refusals come at once."""

from traceback import clear_frames


def one_line(error: BaseException) -> str:
    """What an error says, in one line; its type's name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def let_go(error: BaseException) -> None:
    """Empty the variables of the functions that an error came through: tensors, above all.

    An error holds on to them as long as it lives. What a traceback shows stays.
    """
    each: BaseException | None = error
    while each is not None:
        clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__
