"""From a recipe to the parts of a run: `build.sources(recipe)`, `build.model(recipe, ...)` and so on. Each kind of part
has a file in `building/`."""

from fastdeit.errors import naming
from fastdeit.run.building.extent import check_batch, notes, run_length
from fastdeit.run.building.loaders import eval_loader, loader_device, train_loader
from fastdeit.run.building.messages import Report
from fastdeit.run.building.pictures import augmentations, image_size, mixing, scheduled_size, views
from fastdeit.run.building.samples import class_counts, compared_classes, held_out, sources
from fastdeit.run.building.student import model, not_taken
from fastdeit.run.building.teachers import check_classes, teacher, teacher_field, untrained_teacher
from fastdeit.run.building.training import check_best_by, clipping, known_metrics, method, tuning
