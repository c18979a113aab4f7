"""What describes one tiny model of the zoo: its class and settings, and what is its family's own."""


def spec(cls, settings, length=11, old_rope=False, dtype=None, shard=None, **family):
    """`family` may hold functions of the model's family:

    - `draw(key, shape, unit)`: a parameter from standard normal numbers, or None where zoo.py decides;
    - `batch(name, spec, suffix)`: a batch of inputs, for each of `sides` (suffixes of the files);
    - `rows(name, spec, count)`: a batch for training;
    - `transcription`: the class itself, where it is no class of `transformers` (not a function of the name `cls`);
    - `files(folder)`: rewrites the saved files into another form that the Hub has;
    - `untied`: the head is a parameter of its own, although the class would tie it.
    """
    return dict(cls=cls, settings=settings, length=length, old_rope=old_rope, dtype=dtype, shard=shard, **family)
