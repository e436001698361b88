// OpenAI's images API in JSON, and what it means to flowfast; nothing of HTTP but status codes.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <optional>
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

// What the archive is, and what a request may ask of it.
struct Offer {
  std::string model;                       // the only name that "model" may say
  std::string size;                        // of its images, "32x32"; "" where the archive does not say
  std::string method;                      // of its search
  int64_t micro_batch = 0;                 // with which Python has the same bits
  int64_t transitions = 0;                 // of a sample that is finished
  std::map<std::string, int64_t> quality = {};  // NFE an image; "auto" is there
  int64_t most_images = 10;                // "n"
};

// What a request asks for: searches, one an image, and how it wants to hear of them.
struct Asked {
  std::vector<flowfast::Request> searches = {};
  std::string quality = "auto";
  bool stream = false;
  int64_t partial_images = 0;
};

// Throws Refusal.
Asked read_request(const std::string& body, const Offer& offer);

// Waits for the searches, and tells each image as an event where the request wants a stream. An error of one search
// ends the others, and is the answer.
Answer collect(const Asked& asked, const std::vector<flowfast::Handle>& handles, const Offer& offer,
               const std::function<void(std::string)>& tell);

// The pictures on the way of search number `index`, spread evenly over its budget: each is the furthest on that there
// has been, of these the one with the best reward; once a sample is finished, the best of those.
class Looks {
 public:
  explicit Looks(size_t index) : index_(index) {}
  // After a round: the event that is due, or "".
  std::string due(const flowfast::Progress& now, const Asked& asked, const Offer& offer);

 private:
  size_t index_;
  int64_t passed_ = 0, sent_ = 0;
  std::optional<flowfast::Candidate> best_ = std::nullopt;
};

// The model of this name, "": all there are. created: since when, in seconds of 1970.
Answer models(const Offer& offer, const std::string& name, int64_t created);

// {"error": {"message", "type", "param", "code"}} with the status that fits.
Answer error_answer(const std::exception_ptr& error);
