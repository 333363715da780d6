"""Names of models on this machine: of what was made here, of local folders, and aliases.

    <data>/registry/NAME.json      what is known of a name: its outputs, or what it is an alias of
    <data>/models/NAME/LABEL/      an output of a job
    <data>/isq/KEY/                what a start has quantized in place: its name is isq:KEY
    <data>/trash/                  what is being deleted

A file is written beside its place and renamed, under a lock, so that nobody reads half of one. What
was made here is noted with its path below the data folder, which may be moved.
"""
