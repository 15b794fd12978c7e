-- Stands on both sides of a place's filters: what they may not write is as it was, or the message is refused. `SIDE` is the
-- one that remembers: "request" before them, "response" behind them. `PASSED`: Extensions that requests must have passed.

local metatable_of = debug.getmetatable
local OF_REQUESTS = { [":method"] = true, [":path"] = true, [":authority"] = true, [":scheme"] = true, [":protocol"] = true }

local function remember(handle, kind, also)
  handle:streamInfo():dynamicMetadata():set(KEEPS, kind, print_of(handle:headers(), also))
end

local function kept_of(handle)
  return handle:streamInfo():dynamicMetadata():get(KEEPS) or {}
end

local function is_wrong(handle, kind, also)
  local kept = kept_of(handle)
  local problem = kept[kind] ~= print_of(handle:headers(), also) and "an Extension has changed what it must leave as it is"
  for _, name in ipairs(kind == "request" and PASSED or {}) do
    if kept[name] ~= "passed" then problem = "Extension " .. name .. " has failed" end
  end
  if problem then handle:logErr(problem) end
  return problem
end

-- A filter's own answer, from between the two sides, says no more of itself than that an Extension gave it.
local function is_false(handle)
  local problem = false
  for name, value in pairs(handle:headers()) do -- to its end, or nobody changes them any more
    local told = name == "content-length" or name == "x-uproxy-policy" or (name == "x-uproxy-reason" and value == "extension")
    if protected(name) and not told then problem = "an Extension has answered with " .. name .. ", which it may not write" end
  end
  if problem then handle:logErr(problem) end
  return problem
end

function envoy_on_request(handle)
  if SIDE == "request" then
    remember(handle, "request", OF_REQUESTS)
  elseif is_wrong(handle, "request", OF_REQUESTS) then
    refuse_request(handle, metatable_of(handle), "")
  else
    handle:streamInfo():dynamicMetadata():set(KEEPS, "passed", "yes")
  end
end

function envoy_on_response(handle)
  if SIDE == "response" then
    remember(handle, "response", {})
    return
  end
  local kept, wrong = kept_of(handle), false
  if kept.passed then
    wrong = is_wrong(handle, "response", {})
  elseif kept.request then -- else policy has answered, before the two sides
    wrong = is_false(handle)
  end
  if wrong then
    for _, found in next, debug.getregistry() do
      if type(found) == "table" and rawget(found, "setBytes") then
        return refuse_response(handle, metatable_of(handle), found.setBytes, "")
      end
    end
  end
end
