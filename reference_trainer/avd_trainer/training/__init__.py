"""The engine: runs any method, resumes exactly, saves, logs, exports."""
