// What /metrics says, in Prometheus' text format. Only the thread that serves HTTP touches it.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <sstream>
#include <string>
#include <utility>

class Metrics {
 public:
  void answered(const std::string& route, unsigned status) { ++answers_[{route, status}]; }
  void cancelled() { ++cancelled_; }

  // A request for images that got them.
  void finished(double seconds, int64_t nfe) {
    for (size_t i = 0; i < kBounds.size(); ++i) buckets_[i] += seconds <= kBounds[i];
    ++count_;
    seconds_ += seconds;
    nfe_ += nfe;
  }

  std::string text(int64_t queued, int64_t running) const {
    std::ostringstream out;
    out.precision(17);
    const auto metric = [&](const std::string& name, const char* type, const char* help) {
      out << "# HELP flowfast_" << name << ' ' << help << "\n# TYPE flowfast_" << name << ' ' << type << '\n';
    };
    metric("requests_total", "counter", "Answers, by route and HTTP status.");
    for (const auto& [which, count] : answers_)
      out << "flowfast_requests_total{route=\"" << which.first << "\",status=\"" << which.second << "\"} " << count
          << '\n';
    metric("cancelled_total", "counter", "Requests whose client hung up before the answer.");
    out << "flowfast_cancelled_total " << cancelled_ << '\n';
    metric("nfe_total", "counter", "Rows through the model for the images that were sent.");
    out << "flowfast_nfe_total " << nfe_ << '\n';
    metric("queue_length", "gauge", "Searches under way that hold no slot.");
    out << "flowfast_queue_length " << queued << '\n';
    metric("slots_running", "gauge", "Searches that hold a slot.");
    out << "flowfast_slots_running " << running << '\n';
    metric("request_seconds", "histogram", "From a request for images to its answer, errors apart.");
    for (size_t i = 0; i < kBounds.size(); ++i)
      out << "flowfast_request_seconds_bucket{le=\"" << kNames[i] << "\"} " << buckets_[i] << '\n';
    out << "flowfast_request_seconds_bucket{le=\"+Inf\"} " << count_ << '\n';
    out << "flowfast_request_seconds_sum " << seconds_ << "\nflowfast_request_seconds_count " << count_ << '\n';
    return out.str();
  }

 private:
  static constexpr std::array kBounds = {0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0};
  static constexpr std::array kNames = {"0.05", "0.1", "0.25", "0.5", "1", "2.5", "5", "10", "30", "60"};

  std::map<std::pair<std::string, unsigned>, int64_t> answers_;
  std::array<int64_t, kBounds.size()> buckets_{};
  int64_t cancelled_ = 0, nfe_ = 0, count_ = 0;
  double seconds_ = 0;
};
