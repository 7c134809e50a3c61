"""Files for KubeRay and for ``ray up``: jobs, pods and nodes."""
