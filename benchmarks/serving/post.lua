-- POST the lines of the file BODIES in turn, with KEY as bearer where it is set; one line of JSON at the end.
local bodies, place = {}, 0
for line in io.lines(os.getenv("BODIES")) do bodies[#bodies + 1] = line end
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
if os.getenv("KEY") then wrk.headers["Authorization"] = "Bearer " .. os.getenv("KEY") end
local made = {}

function init()
  for i, body in ipairs(bodies) do made[i] = wrk.format(nil, nil, nil, body) end
end

function request()
  place = place % #made + 1
  return made[place]
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    '{"requests": %.0f, "duration_us": %.0f, "p50_us": %.0f, "p99_us": %.0f, "failed": %.0f}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
end
