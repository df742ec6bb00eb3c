"""An OpenAI-compatible server over any policy: `python -m lab.serve MODEL`.

    client ==HTTP== app, guard, api ---- client ----------pipe---------- worker ---- LLM ---- engine
                    one event loop:      calls in                        its own process: tokens, text,
                    JSON in and out      flight                          steps, memory

The event loop never waits for the engine: it sends what is asked and is told, once per step, all that the step brought.
The engine's process alone has the model and its tokenizer; the one that speaks HTTP needs no torch.
"""
