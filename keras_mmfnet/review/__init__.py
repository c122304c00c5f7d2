"""Review and correction of predicted masks in a browser: `mmfnet review`.

patients      what is reviewed: images, predicted and expert masks, maps
edits         drawings of several structures, and edits of masks
strokes       the strokes since the last version, in a file
corrections   the versions of the masks of a patient
exports       accepted and corrected masks as NIfTI, RTSTRUCT and SEG
server        the web application
page          what the browser gets; `niivue.js` is NiiVue (BSD 2-Clause)
"""
