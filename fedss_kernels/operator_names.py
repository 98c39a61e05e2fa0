"""What the package's operators are called in torch: each by its name and its schema."""

import zlib


def named_by_schema(schema: str) -> tuple[str, str]:
    """("name_1a2b3c4d", the schema "name(...) -> ..." under that name): the digits are the schema's.

    torch keeps compiled code on disk and finds it by what it calls: by names, and not by schemas. So an
    operator that takes other arguments has another name, and the code of another version of the package,
    which calls it with those that it had there, is not found.
    """
    name, bracket, rest = schema.partition("(")
    name = f"{name}_{zlib.crc32(schema.encode()):08x}"
    return name, name + bracket + rest
