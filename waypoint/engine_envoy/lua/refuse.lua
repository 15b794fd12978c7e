-- Answers for a filter that has failed. Before `sandbox.lua` and `guard.lua`, which Envoy runs as one script.

-- Captured before anybody's code runs, who may change what is global.
local pairs, tostring, type, pcall, error = pairs, tostring, type, pcall, error
local sub, lower = string.sub, string.lower

-- Names of headers by which messages end or callers are known.
local function protected(name)
  name = lower(name)
  return UNTOUCHED[name] ~= nil or sub(name, 1, #OURS) == OURS
end

-- What is kept of a message between the two guards, of which nobody's code writes metadata.
local KEEPS = "uproxy.guard"
local function print_of(headers, also)
  local found = {}
  for name, value in pairs(headers) do
    if protected(name) or also[name] then found[#found + 1] = name .. ": " .. value end
  end
  return table.concat(found, "\n")
end

-- Instead of the request's own answer. `methods`: of handles, as Envoy has them.
local function refuse_request(handle, methods, by)
  methods.respond(handle, {
    [":status"] = "503",
    ["content-type"] = "text/plain",
    ["x-uproxy-reason"] = "extension",
    ["x-uproxy-policy"] = by,
  }, TEXT)
end

-- Instead of what a backend has answered. Waits for all of that, since only a body that is whole can be replaced.
local function refuse_response(handle, methods, set_bytes, by)
  local headers = methods.headers(handle)
  local names = {}
  for name in pairs(headers) do names[#names + 1] = name end
  for _, name in ipairs(names) do
    if sub(name, 1, 1) ~= ":" then headers:remove(name) end
  end
  headers:replace(":status", "503")
  headers:replace("content-type", "text/plain")
  headers:replace("x-uproxy-reason", "extension")
  headers:replace("x-uproxy-policy", by)
  local body = methods.body(handle)
  if body then methods.headers(handle):replace("content-length", tostring(set_bytes(body, TEXT))) end
end
