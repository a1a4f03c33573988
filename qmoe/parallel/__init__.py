"""Several processes that hold a model's experts between them: ranks of torch.distributed.

`group` holds the ranks of one model, what they say to each other and how all of them end where one
does; `share` which experts of a layer are a rank's own, and how their outputs are added up. It
knows torch alone, and every room from `experts` upwards may enter.
"""
