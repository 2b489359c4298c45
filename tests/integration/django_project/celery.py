"""The project's Celery app."""

import os

from mdstore.queue import create_app

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.integration.django_project.settings")
app = create_app(name="proj")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
