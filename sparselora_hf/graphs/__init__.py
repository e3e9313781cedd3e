"""CUDA graphs: a decoder layer's forward and backward recorded once, and replayed for every batch of the same form.

A sparse step of a large model is some 2,700 launches, which cost a GPU's host more time than the GPU takes for the
work. Replayed, a layer costs the host one call each way.

Recordings depend on all shapes, so they are made for a *form*: the numbers of rows of each kind, the savings in force,
what the layers are given. The first batch of a form runs as ever, which compiles what it needs; the second is
recorded. All recordings share their memory (`recording`), so one batch is under way at a time: a forward before the
backward of the last one has ended runs as ever, and so does whatever is out of the ordinary.
"""
