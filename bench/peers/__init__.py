"""Other engines beside ours: measured in processes of their own, never needed by the package."""
