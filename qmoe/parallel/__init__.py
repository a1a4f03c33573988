"""Several processes that hold a model's experts between them: ranks of torch.distributed.

`group` holds the ranks of one model, what they say to each other and how all of them end where one
does; `peers` the quicker way between GPUs of one host; `share` which experts of a layer are a
rank's own, and how their outputs are added up; `texts` calls in which each rank has texts of its
own. It knows torch and the kernels alone, and every room from `experts` upwards may enter.
"""
