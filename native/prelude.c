#include "fasa.h"
