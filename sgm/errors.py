"""What users are told of errors; imports nothing, so that refusals come at once."""


def one_line(error: BaseException) -> str:
    """What an error says, in one line; its type's name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
