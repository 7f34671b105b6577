"""Temporary plain console."""
import contextlib, time
class Console:
    @contextlib.contextmanager
    def phase(self, name):
        b=time.time(); yield; print(f"{name} {time.time()-b:.1f}s", flush=True)
    def step(self, m, total):
        print({k:(round(v,4) if isinstance(v,float) else v) for k,v in m.items() if k in ("step","reward/mean","episode/tool_calls_mean","rollout/time_s","rollout/tokens_per_s","train/time_s","train/wait_s","rollout/wait_s","publish/time_s","step/time_s","mismatch/logprob_abs_mean","train/tokens","train/grad_norm","staleness/max","episode/failed")}, flush=True)
    def progress(self,*a): pass
    def samples(self, s): print([x["messages"][-1]["content"] for x in s])
    def eval(self, m): print("EVAL", m, flush=True)
    def notice(self,t): print(t, flush=True)
    def warn(self,t): print("WARN",t, flush=True)
    def summary(self, **k): print(k)
    def interrupted(self,r): print("resume:",r)
    def close(self): pass
