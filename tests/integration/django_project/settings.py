"""Django's settings, with those of Celery in the namespace CELERY."""

import os

LOCKS = os.environ.get("LOCKS", "")
SECRET_KEY = "a test's"
INSTALLED_APPS = ["tests.integration.django_project"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
USE_TZ = True
CELERY_TASK_DEFAULT_QUEUE = "emails"
CELERY_TASK_TIME_LIMIT = 30
CELERY_ONCE = {"backend": "celery_once.backends.File", "settings": {"location": LOCKS, "default_timeout": 60}}
CELERY_SINGLETON_BACKEND_CLASS = "tests.integration.django_project.locks.FileLocks"
CELERY_SINGLETON_BACKEND_KWARGS = {"directory": LOCKS}
