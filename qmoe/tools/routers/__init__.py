"""The parts of :func:`qmoe.tools.adapt_router.adapt_router`, which tells the story.

``windows`` cuts texts, ``targets`` keeps what the teacher said, ``find`` finds the routers and
their tensors on disk, ``train`` lets them learn, ``output`` owns OUT and what lies beside it.
"""
