// POST /v1/images/generations in OpenAI's shape, between JSON and flowfast; nothing of HTTP but status codes.
#pragma once

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <flowfast/searcher.h>

// An answer: the HTTP status, JSON, and what it took.
struct Answer {
  unsigned status = 200;
  std::string body;
  int64_t nfe = 0;
};

// A request that is refused. `field` is the one at fault, if any.
struct Refusal : std::runtime_error {
  Refusal(unsigned status, const std::string& message, std::string field = "")
      : std::runtime_error(message), status(status), field(std::move(field)) {}
  unsigned status;
  std::string field;
};

// What a request may leave out, and may ask for.
struct Limits {
  std::string model;         // the only name that "model" may say
  std::string size;          // of its images, "32x32"; "" where the archive does not say
  int64_t budget = 0;        // where the request names none
  int64_t most_images = 10;  // "n"
};

// The searches that a body asks for, one an image. Throws Refusal.
std::vector<flowfast::Request> read_request(const std::string& body, const Limits& limits);

// Waits for the searches of one request. An error of one ends the others, and is the answer.
Answer collect(const std::vector<flowfast::Request>& searches, const std::vector<flowfast::Handle>& handles);

// {"error": {"message", "type", "param", "code"}} with the status that fits.
Answer error_answer(const std::exception_ptr& error);
