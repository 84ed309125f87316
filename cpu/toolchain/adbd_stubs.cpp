// The parts of adbd that a loopback test does without: keys, USB, debugger connections.
#include <string>

#include "adb.h"
#include "adb_auth.h"
#include "transport.h"

bool auth_required = false;

void adbd_auth_init() {}
void adbd_auth_verified(atransport *) {}
void adbd_cloexec_auth_socket() {}
bool adbd_auth_verify(const char *, size_t, const std::string &, std::string *) { return false; }
void adbd_auth_confirm_key(atransport *) {}
void adbd_notify_framework_connected_key(atransport *) {}
void send_auth_request(atransport *) {}

int init_jdwp() { return 0; }
asocket *create_jdwp_service_socket() { return nullptr; }
asocket *create_jdwp_tracker_service_socket() { return nullptr; }
unique_fd create_jdwp_connection_fd(int) { return {}; }

void init_usb_transport(atransport *, usb_handle *) {}
std::string UsbNoPermissionsShortHelpText() { return {}; }
std::string UsbNoPermissionsLongHelpText() { return {}; }
