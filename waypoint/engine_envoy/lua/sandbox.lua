-- Runs somebody's Lua: `NAME` is its Extension, `OPEN` whether requests go on without it when it fails, `SOURCE` its code.
-- Envoy itself lets requests go on when a script fails, and bounds nothing.

local STEPS = 1000000 -- that one call may take, of the interpreter's; and what is at its top level, once
local EVERY = 10000
local TOO_LONG = "it takes too many steps"

local running, metatable_of = coroutine.running, debug.getmetatable
local xpcall, next = xpcall, next

jit.off() -- what is compiled calls no hooks
local taken = setmetatable({}, { __mode = "k" }) -- steps of each coroutine, which is one call
local ours = false -- what goes on is not somebody's code, and ends by itself
local function exhausted() return (taken[running() or "loading"] or 0) > STEPS end
debug.sethook(function()
  local who = running() or "loading"
  taken[who] = (taken[who] or 0) + EVERY
  if exhausted() and not ours then error(TOO_LONG, 0) end
end, "", EVERY)

-- What is caught is not caught again and again.
local function caught(ok, ...)
  if not ok and exhausted() then error(TOO_LONG, 0) end
  return ok, ...
end

-- Envoy's objects are read to their end first: of headers whose reading stopped on its way nothing can be read or changed
-- any more, so that nothing could be refused.
local function read(object)
  local names, values = {}, {}
  for name, value in pairs(object) do names[#names + 1], values[#values + 1] = name, value end
  return names, values
end
local function pairs_of(object)
  if type(object) ~= "userdata" then return pairs(object) end
  ours = true
  local ok, names, values = pcall(read, object)
  ours = false
  if not ok then error(names, 0) end
  local at = 0
  return function()
    at = at + 1
    return names[at], values[at]
  end
end

local function copy(library, ...)
  local found = {}
  for _, name in ipairs({ ... }) do found[name] = library[name] end
  return found
end

-- No files, programs, machine code, debugger or coroutines; and nothing to write to standard output, which is the log of
-- requests.
local environment = copy(_G, "assert", "error", "ipairs", "next", "rawequal", "rawget", "rawset", "select",
  "setmetatable", "tonumber", "tostring", "type", "unpack", "_VERSION", "EnvoyTimestampResolution")
environment._G = environment
environment.pairs = pairs_of
environment.bit = copy(bit, "tobit", "tohex", "bnot", "band", "bor", "bxor", "lshift", "rshift", "arshift", "rol", "ror",
  "bswap")
environment.math = {}
for name, value in pairs(math) do environment.math[name] = value end
environment.os = copy(os, "clock", "date", "difftime", "time")
environment.string = copy(string, "byte", "char", "find", "format", "gmatch", "gsub", "len", "lower", "match", "rep",
  "reverse", "sub", "upper")
environment.table = copy(table, "concat", "insert", "maxn", "remove", "sort")
environment.getmetatable = function(value) return type(value) == "table" and getmetatable(value) or nil end
environment.pcall = function(...) return caught(pcall(...)) end
environment.xpcall = function(...) return caught(xpcall(...)) end

local chunk, problem = load(SOURCE, "=" .. NAME, "t", environment)
if not chunk then error(problem, 0) end
getmetatable("").__metatable = false
chunk()

-- What is left of Envoy's objects: no calls of its own to anywhere, no other endpoint, no state that others rely on, and no
-- other bodies, since a message must end where its head says. After a head has gone on nothing can be refused, so nothing
-- that comes later is waited for.
local KEPT = {}
for _, name in ipairs({
  "headers", "body", "respond", "metadata", "streamInfo", "connection", "timestamp", "timestampString", "base64Escape",
  "base64Decode", "importPublicKey", "verifySignature", "logTrace", "logDebug", "logInfo", "logWarn", "logErr", "logCritical",
  "add", "get", "getAtIndex", "getNumValues", "remove", "replace", "length", "getBytes", "ssl",
  "protocol", "routeName", "virtualClusterName", "dynamicMetadata", "requestedServerName", "downstreamLocalAddress",
  "downstreamRemoteAddress", "downstreamDirectLocalAddress", "downstreamDirectRemoteAddress",
}) do KEPT[name] = true end

local methods, set_bytes, set_metadata
local function narrow(handle)
  local of_handles = metatable_of(handle)
  set_metadata = metatable_of(handle:streamInfo():dynamicMetadata()).set
  methods = {}
  for name, value in next, of_handles do methods[name] = value end
  for _, found in next, debug.getregistry() do
    if type(found) == "table" and rawget(found, "__index") == found then
      set_bytes = rawget(found, "setBytes") or set_bytes
      for name in next, found do
        if type(name) == "string" and sub(name, 1, 2) ~= "__" and not KEPT[name] then found[name] = nil end
      end
    end
  end
  of_handles.respond = function(self, headers, body)
    for name in next, headers do
      if protected(name) then error(name .. " is the waypoint's own to write") end
    end
    return methods.respond(self, headers, body)
  end
end

local function keep(handle, name, value)
  set_metadata(methods.streamInfo(handle):dynamicMetadata(), KEEPS, name, value)
end

local function called(call, refuse, passed)
  return function(handle)
    if not methods then narrow(handle) end
    local ok, problem = pcall(call, handle)
    if ok and not exhausted() then return passed(handle) end
    taken[running()] = nil
    -- What is no text may have code of its own for becoming some.
    methods.logErr(handle, "Extension " .. NAME .. ": " .. (type(problem) == "string" and problem or type(problem)))
    if not OPEN then refuse(handle) end
  end
end
local function nothing() end

-- Of a request the guard wants to be told that this has passed it: who fails here in a way that nobody thought of does not.
envoy_on_request = called(environment.envoy_on_request or nothing, function(handle)
  refuse_request(handle, methods, NAME)
end, function(handle)
  keep(handle, NAME, "passed")
end)
envoy_on_response = environment.envoy_on_response and called(environment.envoy_on_response, function(handle)
  refuse_response(handle, methods, set_bytes, NAME)
  keep(handle, "response", print_of(methods.headers(handle), {}))
end, nothing)
