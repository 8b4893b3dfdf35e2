"""llama.cpp's server as the wheel xllamacpp brings it: a program for the Python of its environment.

Arguments: model, port, tokens of context, threads and, with drafts, the head and K.
"""

import sys
import threading


def main() -> None:
    import xllamacpp

    model, port, context, threads, *drafts = sys.argv[1:]
    p = xllamacpp.CommonParams()
    p.model.path, p.port, p.n_parallel, p.n_ctx = model, int(port), 1, int(context)
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = int(threads)
    p.warmup = p.fit_params = p.cache_prompt = False
    p.endpoint_metrics = True
    if drafts:
        s = p.speculative
        s.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        s.draft.mparams.path, s.draft.n_max = drafts[0], int(drafts[1])
        s.draft.cpuparams.n_threads = s.draft.cpuparams_batch.n_threads = int(threads)
    server = xllamacpp.Server(p)
    threading.Event().wait()
    del server  # it lives until here


if __name__ == "__main__":
    main()
