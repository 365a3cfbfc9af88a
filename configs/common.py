"""What every config file shares: parsing of the string after the colon, `configs/x.py:demo,lr=1e-3`."""


def parse_arg(arg: str | None, **spec):
    """Parses "flag,key=value,..." into the types of the defaults in `spec`.

    >>> parse_arg("demo,lr=0.1", demo=False, lr=1e-3)
    {'demo': True, 'lr': 0.1}

    Raises:
      ValueError: a key that `spec` does not have, or a value of another type.
    """
    values = dict(spec)
    for item in filter(None, (arg or "").split(",")):
        key, sign, text = item.partition("=")
        if key not in spec:
            raise ValueError(f"config argument {key!r} is not one of {', '.join(spec)}")
        default = spec[key]
        if isinstance(default, bool):
            if sign and text.lower() not in ("true", "false", "1", "0"):
                raise ValueError(f"config argument {key}={text!r}: give true or false")
            values[key] = text.lower() in ("true", "1") if sign else True
        else:
            try:
                values[key] = type(default)(text) if default is not None else text
            except ValueError:
                raise ValueError(f"config argument {key}={text!r}: give a {type(default).__name__}") from None
    return values
