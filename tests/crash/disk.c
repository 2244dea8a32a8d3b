/* The calls by which a process changes files, as SQLite makes them: one of them may fail or be the
   last. For LD_PRELOAD on Linux. Only files under the folder given to disk_arm count.

   What was synced is copied to the folder `platter`: what a power loss leaves for certain. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static char folder[4096], platter[4096];
static int calls, chosen, code; /* code: errno of the chosen call; 0: the process ends there */

void disk_arm(const char *where, const char *synced, int call, int error) {
  snprintf(folder, sizeof folder, "%s", where);
  snprintf(platter, sizeof platter, "%s", synced);
  calls = 0, chosen = call, code = error;
}
int disk_calls(void) { return calls; }

static int ours(const char *path) { return *folder && !strncmp(path, folder, strlen(folder)); }

static int path_of(int fd, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, 4095);
  if (n < 0) return 0;
  path[n] = 0;
  return ours(path);
}

/* 1: this is the call, and it fails; it has ended the process already if that was asked for. */
static int strikes(void) {
  if (++calls != chosen) return 0;
  if (!code) _exit(9);
  errno = code;
  return 1;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t n) {
  REAL(write);
  char path[4096];
  if (!path_of(fd, path)) return real(fd, data, n);
  if (calls + 1 == chosen) real(fd, data, n / 2); /* the worst moment is in the middle */
  return strikes() ? -1 : real(fd, data, n);
}
static ssize_t pwrite_(int fd, const void *data, size_t n, off64_t at) {
  static ssize_t (*real)(int, const void *, size_t, off64_t);
  if (!real) real = (__typeof__(real))dlsym(RTLD_NEXT, "pwrite64");
  char path[4096];
  if (!path_of(fd, path)) return real(fd, data, n, at);
  if (calls + 1 == chosen) real(fd, data, n / 2, at);
  return strikes() ? -1 : real(fd, data, n, at);
}
ssize_t pwrite(int fd, const void *d, size_t n, off_t at) { return pwrite_(fd, d, n, at); }
ssize_t pwrite64(int fd, const void *d, size_t n, off64_t at) { return pwrite_(fd, d, n, at); }

int ftruncate64(int fd, off64_t n) {
  REAL(ftruncate64);
  char path[4096];
  return path_of(fd, path) && strikes() ? -1 : real(fd, n);
}
int ftruncate(int fd, off_t n) { return ftruncate64(fd, n); }

int unlink(const char *path) {
  REAL(unlink);
  if (ours(path) && strikes()) return -1;
  return real(path);
}

/* The folder is synced: what was deleted stays so. */
static int sync_names(void) {
  REAL(unlink);
  DIR *names = opendir(platter);
  for (struct dirent *entry; (entry = readdir(names));) {
    char path[8300], copy[8300];
    snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
    snprintf(copy, sizeof copy, "%s/%s", platter, entry->d_name);
    if (access(path, F_OK)) real(copy);
  }
  closedir(names);
  return 0;
}

/* No test waits for a real disk. */
static int sync_(int fd) {
  char path[4096], copy[8300], data[65536];
  if (!path_of(fd, path)) return 0;
  if (strikes()) return -1;
  const char *name = path + strlen(folder);
  if (!*name) return sync_names();
  snprintf(copy, sizeof copy, "%s%s", platter, name);
  int from = open(path, O_RDONLY), to = open(copy, O_WRONLY | O_CREAT | O_TRUNC, 0600);
  REAL(write);
  for (ssize_t n; (n = read(from, data, sizeof data)) > 0;)
    if (real(to, data, n) != n) _exit(8);
  close(from), close(to);
  return 0;
}
int fsync(int fd) { return sync_(fd); }
int fdatasync(int fd) { return sync_(fd); }
