from hypothesis import settings

# The same examples everywhere and every time: neither an earlier run nor a slow machine decides.
settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.load_profile("same")
