"""From record ids to the arrays of a batch: one file per kind of batch, selected by name.

A module `collate/<name>.py` has

    make(dataset, ids, *, train, seed, buckets, **options) -> collate

and `collate`, which is picklable (worker processes get a copy), has

    ids         (n,) int64, those of the given record ids that it keeps
    sizes       {axis: (n,) int64}: what the plan packs into buckets, aligned with `ids`
    elements    (number of records,) float64, by record id: padded elements (as `slots` counts) that carry data
    digest      str, a hash of every option that changes a batch
    slots(bucket)                        -> int, padded elements of one row of a batch, such as slices or tokens
    spec(bucket, b)                      -> {key: (shape, dtype)} of `b` rows
    assemble(bucket, ids, step, pool)    -> {key: array}: exactly those keys, shapes and dtypes; ids (b,), or
                                            (b, k) if the mode puts several records into a row, may be PAD (-1);
                                            a function of (bucket, ids, step) alone; `pool` is a thread pool or None

Every batch has `_mask (b,)` float32, 0 for padding rows, and `_id (b,)` int32, the record ids.
"""
