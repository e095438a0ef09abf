def render(*a): return str(a)
